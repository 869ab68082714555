"""``qwen-surgery chat``: talk to exported nets or to a bmodel."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_surgery import console, extras
from qwen_surgery.errors import SurgeryError, Usage

if TYPE_CHECKING:
    from qwen_surgery.chatting.chat import Chat
    from qwen_surgery.packing.report import Speed
    from qwen_surgery.runtime.host import Sampling

_HELP = "/reset begins anew, Ctrl-C stops an answer, an empty line or Ctrl-D ends the conversation."


@click.command("chat")
@click.option("--onnx", type=click.Path(path_type=Path), help="An exported folder, run by onnxruntime.")
@click.option("--bmodel", type=click.Path(path_type=Path), help="A bmodel, run on the emulator.")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder with the tokenizer's files and generation_config.json, such as the checkout.",
)
@click.option("--prompt", help="Say this, print the answer, stop.  [default: a conversation]")
@click.option(
    "--system",
    help="The system prompt.  [default: as the model's chat template says, or: You are a helpful assistant.]",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Of one answer.  [default: as generation_config.json says]"
)
@click.option(
    "--sample/--greedy",
    "sample",
    default=None,
    help="Draw from the best tokens, or take the best.  [default: as generation_config.json says]",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="  [default: as the file says]")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="  [default: as the file says]")
@click.option("--penalty", type=click.FloatRange(0, min_open=True), help="  [default: as the file says]")
@click.option("--seed", type=click.IntRange(0), help="Repeats the draws of a conversation.  [default: drawn]")
@click.option("--toolchain", metavar="VERSION", help="TPU-MLIR version for --bmodel.")
def command(
    onnx: Path | None,
    bmodel: Path | None,
    tokenizer_dir: Path,
    prompt: str | None,
    system: str | None,
    max_tokens: int | None,
    sample: bool | None,
    top_p: float | None,
    temperature: float | None,
    penalty: float | None,
    seed: int | None,
    toolchain: str | None,
) -> None:
    """Talk to exported nets (fast) or to a bmodel on the chip emulator (slow), in the terminal."""
    extras.require("chat")
    from qwen_surgery.chatting.chat import Chat, Generation, chip_geometry, open_onnx
    from qwen_surgery.tokenizer import Tokenizer

    if (onnx is None) == (bmodel is None):
        raise Usage("give either --onnx DIR or --bmodel FILE")
    tokenizer = Tokenizer.open(tokenizer_dir)
    generation = Generation.of(tokenizer_dir)
    settings = {"top_p": top_p, "temperature": temperature, "penalty": penalty}
    sampling = _sampling(
        generation.sampling, sample, {k: v for k, v in settings.items() if v is not None}, seed
    )
    speed: Speed | None = None
    with contextlib.ExitStack() as stack:
        if onnx is not None:
            engine, geometry = open_onnx(onnx)
        else:
            from qwen_surgery.packing.report import inspect
            from qwen_surgery.runtime.several import open_chip
            from qwen_surgery.toolchain.environment import Toolchain

            assert bmodel is not None
            speed = inspect(bmodel).speed
            chip = open_chip(bmodel, Toolchain.find(toolchain))
            stack.callback(chip.close)
            engine, geometry = chip, chip_geometry(chip)
            console.err().print(
                "The emulator computes what the chip computes, thousands of times slower: "
                "expect a token a second for a tiny model, many minutes for a token of a real one."
            )
        chat = Chat(engine, geometry, tokenizer, sampling, system, generation.stops)
        limit = max_tokens or generation.max_tokens
        if prompt is not None:
            _answer(chat, prompt, limit)
            _say_speed(chat, speed)
        else:
            _converse(chat, limit, speed)


def _sampling(
    said: Sampling | None, sample: bool | None, settings: dict[str, float], seed: int | None
) -> Sampling | None:
    """The file's settings, those of the command line over them; None for greedy."""
    import secrets

    from qwen_surgery.runtime.host import Sampling

    if sample is False or (sample is None and said is None and not settings):
        if settings:
            raise Usage(f"--{next(iter(settings)).replace('_', '-')} means nothing with --greedy")
        return None
    return replace(said or Sampling(), **settings, seed=secrets.randbits(32) if seed is None else seed)  # type: ignore[arg-type]


def _answer(chat: Chat, text: str, limit: int) -> None:
    """Print the answer as it comes. Ctrl-C stops it, not the program."""
    pieces = chat.say(text, limit)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    finally:
        pieces.close()
    sys.stdout.write("\n")


def _say_speed(chat: Chat, speed: Speed | None) -> None:
    if not chat.spoken:
        return
    said = f"{chat.spoken} tokens, {chat.spoken / max(chat.seconds, 1e-9):.1f} a second here"
    if speed is not None:
        said += f"; {speed.tokens_per_second:.1f} a second predicted on the chip"
    console.err().print(f"({said})", style="dim")


def _converse(chat: Chat, limit: int, speed: Speed | None) -> None:
    console.err().print(_HELP)
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:  # Ctrl-D, or Ctrl-C with nothing said
            console.err().print()
            return
        if not text:
            return
        if text.strip() == "/reset":
            chat.turns.clear()
            console.err().print("(a new conversation)", style="dim")
            continue
        try:
            _answer(chat, text, limit)
        except SurgeryError as error:  # a prompt that does not fit, say: the conversation goes on
            console.err().print(f"{error}  ({error.hint})" if error.hint else str(error))
            continue
        _say_speed(chat, speed)
