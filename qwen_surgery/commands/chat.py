"""``qwen-surgery chat``: does the model still talk?"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_surgery import console
from qwen_surgery.errors import Usage

if TYPE_CHECKING:
    from qwen_surgery.chatting.chat import Chat


@click.command("chat", help="Talk to exported nets (fast) or to a bmodel on the chip emulator (slow).")
@click.option("--onnx", type=click.Path(path_type=Path), help="An exported folder, run by onnxruntime.")
@click.option("--bmodel", type=click.Path(path_type=Path), help="A bmodel, run on the emulator.")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder with qwen.tiktoken, such as the checkout.",
)
@click.option("--prompt", help="Say this, print the answer, stop.  [default: a conversation]")
@click.option("--system", help="The system prompt.  [default: You are a helpful assistant.]")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--sample", is_flag=True, help="Penalty sampling instead of the best token.")
@click.option("--top-p", default=0.8, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--temperature", default=0.98, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--penalty", default=1.1, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--toolchain", metavar="VERSION", help="TPU-MLIR version for --bmodel.")
def command(
    onnx: Path | None,
    bmodel: Path | None,
    tokenizer_dir: Path,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    sample: bool,
    top_p: float,
    temperature: float,
    penalty: float,
    seed: int,
    toolchain: str | None,
) -> None:
    from qwen_surgery.chatting.chat import SYSTEM, Chat, chip_geometry, open_onnx
    from qwen_surgery.chatting.tokenizer import Tokenizer
    from qwen_surgery.verification.runtime import Sampling

    if (onnx is None) == (bmodel is None):
        raise Usage("give either --onnx DIR or --bmodel FILE")
    tokenizer = Tokenizer.open(tokenizer_dir)
    sampling = Sampling(top_p, temperature, penalty, seed=seed) if sample else None
    with contextlib.ExitStack() as stack:
        if onnx is not None:
            engine, geometry = open_onnx(onnx)
        else:
            from qwen_surgery.toolchain.emulator import ChipEngine
            from qwen_surgery.toolchain.environment import Toolchain

            assert bmodel is not None
            chip = stack.enter_context(ChipEngine(bmodel, Toolchain.find(toolchain)))
            engine, geometry = chip, chip_geometry(chip)
            console.err().print(
                "The emulator computes what the chip computes, thousands of times slower: "
                "expect a token a second for a tiny model, many minutes for a token of a real one."
            )
        chat = Chat(engine, geometry, tokenizer, sampling, SYSTEM if system is None else system)
        if prompt is not None:
            _answer(chat, prompt, max_tokens)
        else:
            _converse(chat, max_tokens)


def _answer(chat: Chat, text: str, limit: int) -> None:
    for piece in chat.say(text, limit):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _converse(chat: Chat, limit: int) -> None:
    console.err().print("An empty line or Ctrl-D ends the conversation; /new starts another.")
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:  # Ctrl-D
            return
        if not text:
            return
        if text == "/new":
            chat.turns.clear()
            continue
        _answer(chat, text, limit)
