"""Compiles the vendor's own demos, as they are in a clone's history, against the toolchain's bmruntime.

Nothing of theirs is kept: sources and headers go from the clone to a temporary folder. What is written here
stands in for what the demos need beside bmruntime: pybind11 (they are Python modules) and a tokenizer.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_surgery.runtime.generations import FUSED, GENERIC, HEADS
from qwen_surgery.toolchain import Toolchain
from qwen_surgery.toolchain.emulator import emulator_library
from qwen_surgery.toolchain.preload import EMULATOR_YIELD, compile_shared

PYTHON_DEMO = "models/Qwen/python_demo/chat.cpp"
DEMO = "models/Qwen/demo/demo.cpp"
PARALLEL = "models/Qwen/demo_parallel/demo_parallel.cpp"
#: demo_parallel takes the shape of device 1's first output for its hidden states. On one device that is past
#: the list's end, and bmruntime ends the process; the first output's own shape is the same one.
_PAST_THE_END = re.compile(r"\[0 \+ out_num(_cache)?\]")


@dataclass(frozen=True)
class Demo:
    """One demo at one commit. ``driver`` is how its class is used, ``asks`` whether it asks for shared
    memory itself; where it does not, it was written for runtimes that always shared. ``samples``: its name
    for sampling, empty where it has none. ``window``: it hands the sampling head the latest tokens alone.
    """

    commit: str
    path: str
    driver: str
    heads: str = HEADS
    asks: bool = True
    samples: str = ""
    window: bool = True

    @property
    def name(self) -> str:
        return f"{self.path.removeprefix('models/')}@{self.commit}"


DEMOS = (
    *(Demo(commit, DEMO, "fused", FUSED, asks=False) for commit in ("b88ac42", "5920d3b")),
    Demo("8cbcbff", DEMO, "chat", asks=False),
    Demo("ff6adf0", DEMO, "chat", asks=False),
    Demo("0ce815b", PYTHON_DEMO, "chat", asks=False),
    Demo("d1ed824", PYTHON_DEMO, "chat", asks=False),
    Demo("78f938b", PYTHON_DEMO, "chat", asks=False, samples="penalty_sample"),
    Demo("81bb6f1", PYTHON_DEMO, "chat", asks=False, samples="penalty_sample"),
    *(
        Demo(commit, PYTHON_DEMO, "chat", samples="penalty_sample")
        for commit in ("1e8f264", "089c2a5", "2aa8225", "0326548", "0eea0dc", "a4637c9", "1cf8611")
    ),
    Demo("1cf8611", "models/Qwen2_5/python_demo/chat.cpp", "chat"),
    Demo("1cf8611", "models/Qwen3/python_demo/chat.cpp", "chat"),
    Demo("e70eb9f", "models/Qwen2_5/python_demo/chat.cpp", "chat", GENERIC, samples="sample", window=False),
    Demo("c443027", "models/Qwen3/python_demo/chat.cpp", "chat", GENERIC, samples="sample"),
    *(Demo(commit, PARALLEL, "parallel", FUSED) for commit in ("1e8f264", "a4637c9", "1cf8611")),
)

_PYBIND = """
#pragma once
namespace pybind11 {
struct module_ {};
template <class... T> struct init {};
template <class T> struct class_ {
  template <class... A> explicit class_(A &&...) {}
  template <class... A> class_ &def(A &&...) { return *this; }
  template <class... A> class_ &def_readwrite(A &&...) { return *this; }
  template <class... A> class_ &def_readonly(A &&...) { return *this; }
};
}
#define PYBIND11_MODULE(name, variable) static inline void bind_##name(pybind11::module_ &variable)
"""

_TOKENIZER = """
#pragma once
#include <memory>
#include <string>
#include <vector>
struct QwenTokenizer {
  explicit QwenTokenizer(const std::string &) {}
  template <class... A> std::vector<int> encode_history(A &&...) { return {}; }
  template <class... A> std::vector<int> encode(A &&...) { return {}; }
  template <class... A> std::string decode(A &&...) { return ""; }
  int im_end_id = -1, im_start_id = -1, eod_id = -1;
};
"""

_HEAD = """
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>
#include "bmruntime_interface.h"
#include "tokenizer.h"
extern "C" void bmrt_set_flags(void *, uint32_t);
#ifdef SHARE
static bool load_shared(void *runtime, const char *path) {
  bmrt_set_flags(runtime, 1);
  return bmrt_load_bmodel(runtime, path);
}
#define bmrt_load_bmodel load_shared
#endif
#define private public
#define main main_of_the_demo
#include "demo.cpp"
#undef main
static std::vector<int> numbers(const char *text) {
  std::vector<int> found;
  std::stringstream stream(text);
  for (int one; stream >> one;) found.push_back(one);
  return found;
}
static void say(const char *what, double number) { fprintf(stderr, "@%s %.9g\\n", what, number); }
"""

#: What each kind of driver does between loading and the end: argv is MODEL PROMPT TEXT MODE.
_DRIVERS = {
    "chat": """
template <class M> static auto text_in(M &model, int token, int) -> decltype(model.visited_tokens, void()) {
  model.visited_tokens[model.token_length - 1] = token;
}
#ifdef SAMPLES
static void candidates(Qwen &model) {
  auto &places = model.SAMPLES->stages[0].output_mems;
  std::vector<float> shares(50);
  std::vector<int> tokens(50);
  bm_memcpy_d2s(model.bm_handle, shares.data(), places[0]);
  bm_memcpy_d2s(model.bm_handle, tokens.data(), places[1]);
  for (int i = 0; i < 50; i++) say("share", shares[i]), say("candidate", tokens[i]);
}
#else
static void candidates(Qwen &) {}
#endif
int main(int, char **argv) {
  auto prompt = numbers(argv[2]), text = numbers(argv[3]);
  Qwen model;
  START(model, argv[1]);
  KNOBS(model)
  model.generation_mode = argv[4];
  for (size_t step = 0; step < text.size(); step++) {
    int token = step ? model.forward_next() : model.forward_first(prompt);
    say("token", token);
    if (strcmp(argv[4], "greedy")) candidates(model);
    text_in(model, text[step], 0);
  }
  fflush(stderr);
  _Exit(0);
}
""",
    "fused": """
int main(int, char **argv) {
  auto prompt = numbers(argv[2]), text = numbers(argv[3]);
  Qwen model;
  model.init({0}, argv[1], "");
  model.token_count = prompt.size();
  for (size_t step = 0; step < text.size(); step++) {
    say("token", step ? model.forward_next() : model.forward_first(prompt));
    model.token_count++;
  }
  fflush(stderr);
  _Exit(0);
}
""",
    "parallel": """
int main(int, char **argv) {
  auto prompt = numbers(argv[2]), text = numbers(argv[3]);
  QwenChat model;
  model.init({0}, argv[1], "");
  model.token_length = prompt.size();
  for (size_t step = 0; step < text.size(); step++) {
    say("token", step ? model.forward_next(text[step - 1]) : model.forward_first(prompt));
    model.token_length++;
  }
  fflush(stderr);
  _Exit(0);
}
""",
}


class Workshop:
    """A clone, a toolchain and a folder in which demos are compiled, each once a way of sharing memory."""

    def __init__(self, clone: Path, toolchain: Toolchain, folder: Path) -> None:
        self._clone, self._toolchain, self._folder = clone, toolchain, folder
        (folder / "libcmodel.so").symlink_to(emulator_library("BM1684X", toolchain))
        self._preload = compile_shared(EMULATOR_YIELD, folder)

    def _show(self, commit: str, path: str) -> str:
        command = ["git", "-C", str(self._clone), "show", f"{commit}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def compiled(self, demo: Demo) -> Path:
        """The demo's program; AssertionError, with the compiler's words, when it does not compile."""
        folder = self._folder / demo.name.replace("/", "-")
        program = folder / "demo"
        if program.exists():
            return program
        (folder / "pybind11").mkdir(parents=True)
        for name in ("bmruntime_interface.h", "bmdef.h", "bmlib_runtime.h"):
            (folder / name).write_text(self._show(demo.commit, f"models/Qwen/support/include/{name}"))
        source = self._show(demo.commit, demo.path)
        (folder / "demo.cpp").write_text(_PAST_THE_END.sub("[0]", source))
        (folder / "tokenizer.h").write_text(_TOKENIZER)
        (folder / "pybind11/pybind11.h").write_text(_PYBIND)
        (folder / "pybind11/stl.h").write_text("")
        (folder / "driver.cpp").write_text(_HEAD + self._driver(demo))
        libraries = self._toolchain.root / "lib"
        head = "net_sample_head" if demo.heads == GENERIC else "net_penalty_sample_head"
        flags = [*(["-DSHARE"] if not demo.asks else []), *([f"-DSAMPLES={head}"] if demo.samples else [])]
        command = ["g++", "-std=c++17", "-O1", "-w", "-fpermissive", *flags, f"-I{folder}", "driver.cpp"]
        links = [f"-L{libraries}", "-lbmrt", "-lbmlib", "-lpthread", "-ldl", "-Wl,--allow-shlib-undefined"]
        done = subprocess.run(
            [*command, "-o", "demo", *links], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{demo.name} does not compile: {done.stderr[-2000:]}"
        return program

    @staticmethod
    def _driver(demo: Demo) -> str:
        start = "m.init({0}, f)"
        knobs = ""
        if demo.path == DEMO and demo.driver == "chat":
            start = 'm.init({0}, f, "", 0.98f, 0.8f, 1.1f, 32, 8, "greedy", "")'
        elif demo.heads == GENERIC:
            knobs = "m.temperature = 0.98f; m.top_p = 0.8f; m.penalty = 1.1f; m.top_k = 20;"
            knobs += " m.repetition_window = 32;" if demo.window else ""
        elif demo.samples:
            knobs = "m.temperature = 0.98f; m.top_p = 0.8f; m.repeat_penalty = 1.1f; m.repeat_last_n = 32;"
        return f"#define START(m, f) {start}\n#define KNOBS(m) {knobs}\n{_DRIVERS[demo.driver]}"

    def run(
        self, demo: Demo, bmodel: Path, prompt: Sequence[int], text: Sequence[int], mode: str
    ) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
        """Tokens that the demo chose at each step of *text*, and the candidates it drew from.

        Raises RuntimeError with its last words when it dies.
        """
        program = self.compiled(demo)
        env = self._toolchain.environ()
        env["LD_LIBRARY_PATH"] = f"{self._folder}:{env['LD_LIBRARY_PATH']}"
        if self._preload:
            env["LD_PRELOAD"] = str(self._preload)
        words = [" ".join(map(str, numbers)) for numbers in (prompt, text)]
        done = subprocess.run(
            [str(program), str(bmodel), *words, mode],
            cwd=program.parent, env=env, capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{demo.name} ended with status {done.returncode}: {done.stderr[-300:]}")
        said = [line[1:].split() for line in done.stderr.splitlines() if line.startswith("@")]
        values = {what: [float(v) for w, v in said if w == what] for what in ("token", "share", "candidate")}
        shares = np.array(values["share"], np.float32).reshape(-1, 1, 50)
        candidates = np.array(values["candidate"]).astype(np.int32).reshape(-1, 1, 50)
        return [int(t) for t in values["token"]], list(zip(shares, candidates, strict=True))
