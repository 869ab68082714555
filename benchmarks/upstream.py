"""The unpatched model as transformers loads and runs it, against what this project takes for it.

    python benchmarks/upstream.py PYTHON                        the seven eras, tiny
    python benchmarks/upstream.py PYTHON --upstream QWEN_CLONE  and every revision of upstream's history
    python benchmarks/upstream.py PYTHON --checkout PATH --prompt 20    one checkout of any size

PYTHON is an interpreter with torch and the transformers of Qwen v1's time, whose ``generate`` its code was
written for::

    python3.11 -m venv old && old/bin/pip install 'transformers==4.37.2' torch numpy einops tiktoken \
        transformers_stream_generator

Revisions of era kv-quant import a CUDA module, ``kernels.cpp_kernels``, which they do not use on a CPU: an
empty one with the name ``cache_autogptq_cuda_256`` does.

There, ``AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True, fp32=True)`` reads a prompt, then
greedy tokens through the model's cache, and ``generate`` continues the same prompt by itself (the real
revisions; the eras' own-written models leave out what only ``generate`` needs). Here, the
reference (one layer's weights in memory at a time where the model is big) reads the same tokens, and the nets
of the patched code are driven as a runtime drives them. Printed are the largest difference of logits,
relative to the largest logit (at least 1), whether all three say the same tokens, and for one checkout both
sides' wall seconds and peak memory. Ends with exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.eras import ERAS, make_checkout
from qwen_surgery.checkout import Checkout
from qwen_surgery.patching.sources import Sources
from qwen_surgery.verification.engines import TorchEngine
from qwen_surgery.verification.reference import ReferenceModel
from qwen_surgery.verification.runtime import Runtime
from qwen_surgery.weights import WeightIndex

LIMIT = 1e-5
SEQ_LENGTH = 48
STEPS = 12

#: Runs in the other interpreter: checkout, tokens of the prompt (JSON), steps, file for the numbers.
THERE = """\
import json, resource, sys, time
import numpy, torch, transformers
from transformers import AutoModelForCausalLM, GenerationConfig

path, prompt, steps, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, fp32=True, device_map=None).eval()
model.generation_config = GenerationConfig(
    max_new_tokens=steps + 1, do_sample=False, eos_token_id=None, pad_token_id=0, chat_format="raw"
)
loaded = time.perf_counter() - started
ids, past, logits, tokens = torch.tensor([prompt]), None, [], []
with torch.no_grad():
    for _ in range(steps + 1):
        done = model(input_ids=ids, past_key_values=past, use_cache=True, return_dict=True)
        logits.append(done.logits[0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
        ids, past = torch.tensor([tokens[-1:]]), done.past_key_values
    ran = time.perf_counter() - started - loaded
    ids = torch.tensor([prompt])
    said = []
    if "prepare_inputs_for_generation" in vars(type(model)):
        said = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt):].tolist()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
about = {"loaded": loaded, "ran": ran, "peak": peak, "version": transformers.__version__}
numpy.savez(out, logits=numpy.stack(logits), tokens=tokens, said=said, about=json.dumps(about))
"""


@dataclass(frozen=True)
class Run:
    """One side's logits [steps + 1, V], greedy tokens, wall seconds and peak bytes."""

    logits: np.ndarray
    tokens: list[int]
    seconds: float
    peak: int


@dataclass(frozen=True)
class Outcome:
    """``worst`` is the largest relative difference of logits; ``generated``, ``referenced`` and ``netted``
    say whether generate, the reference and the nets say the tokens of transformers' model (None: not run)."""

    worst: float
    generated: bool | None
    referenced: bool
    netted: bool | None
    there: Run
    here: Run

    @property
    def equal(self) -> bool:
        return self.worst <= LIMIT and False not in (self.generated, self.referenced, self.netted)


def there(python: Path, checkout: Path, prompt: list[int], steps: int) -> tuple[Run, list[int]]:
    """The model as transformers runs it, and what its ``generate`` says."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "there.npz"
        command = [str(python), "-W", "ignore", "-c", THERE, str(checkout), json.dumps(prompt), str(steps)]
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{checkout}: {done.stderr[-3000:]}")
        found = np.load(file)
        about = json.loads(str(found["about"]))
        run = Run(found["logits"], found["tokens"].tolist(), about["loaded"] + about["ran"], about["peak"])
        return run, found["said"].tolist()


def here(checkout: Path, prompt: list[int], tokens: list[int], seq_length: int, *, nets: bool) -> Any:
    """The reference's run over the same *tokens*, and the nets' own greedy tokens (None without *nets*)."""
    import resource

    started = time.perf_counter()
    opened, index = Checkout.open(checkout), WeightIndex.open(checkout)
    sources = Sources.of(opened, recipe="static", seq_length=seq_length)
    reference = ReferenceModel(sources.reference, index, modeling=sources.modeling, layers=())
    record = reference.prefill(prompt)
    logits = [record.logits]
    for token in tokens[:-1]:
        logits.append(reference.decode(token).logits)
    found = np.stack([one for one in logits if one is not None])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = Run(found, [int(one.argmax()) for one in found], time.perf_counter() - started, peak)
    if not nets:
        return run, None
    driven = Runtime(TorchEngine(sources, index, opened.geometry(seq_length)), opened.geometry(seq_length))
    said = [driven.greedy(driven.prefill(prompt))]
    while len(said) < len(tokens):
        said.append(driven.greedy(driven.decode(said[-1])))
    return run, said


def compare(python: Path, checkout: Path, length: int, steps: int, *, nets: bool) -> Outcome:
    """Both sides of *checkout* on a random prompt of *length* tokens."""
    vocab = json.loads((checkout / "config.json").read_text())["vocab_size"]
    prompt = [int(token) for token in np.random.default_rng(length).integers(0, vocab, length)]
    theirs, said = there(python, checkout, prompt, steps)
    mine, driven = here(checkout, prompt, theirs.tokens, length + steps, nets=nets)
    worst = float(np.abs(theirs.logits - mine.logits).max() / max(1.0, np.abs(theirs.logits).max()))
    same = None if driven is None else driven == theirs.tokens
    generated = said == theirs.tokens if said else None
    return Outcome(worst, generated, mine.tokens == theirs.tokens, same, theirs, mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("python", type=Path)
    parser.add_argument("--upstream", type=Path, help="a clone of a Qwen v1 repository")
    parser.add_argument("--checkout", type=Path, help="this one alone")
    parser.add_argument("--prompt", type=int, default=17)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in checkouts(given, Path(scratch)):
            found = compare(given.python, path, given.prompt, given.steps, nets=given.checkout is None)
            failed += not found.equal
            print(line(name, found), flush=True)
            if given.checkout:
                for side, run in (("transformers", found.there), ("reference", found.here)):
                    print(f"  {side}: {run.seconds:.0f} s, {run.peak / 1e9:.2f} GB")
    sys.exit(1 if failed else 0)


def checkouts(given: argparse.Namespace, scratch: Path) -> Any:
    """(name, folder) of what is to be compared, made as it is asked for."""
    if given.checkout:
        yield given.checkout.name, given.checkout
        return
    for era in ERAS:
        yield era, make_checkout(scratch / era, era=era, layers=3)
    if given.upstream:
        from tests.codemods.test_history import git
        from tests.verification.test_history import MODELING, checkout_of

        for revision in git(given.upstream, "log", "--all", "--format=%h", "--", MODELING).decode().split():
            yield revision, checkout_of(given.upstream, revision, scratch / revision)


def line(name: str, found: Outcome) -> str:
    words = {True: "equal", False: "OTHER", None: "not run"}
    return (
        f"{name:16} logits {found.worst:.1e}  generate {words[found.generated]}  "
        f"reference {words[found.referenced]}  nets {words[found.netted]}"
    )


if __name__ == "__main__":
    main()
