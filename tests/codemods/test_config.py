"""config.json is edited without disturbing a character that is not a changed value."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codemods.config import ConfigError, ModelFacts, run
from codemods.framework.base import Status

UPSTREAM = """{
  "architectures": ["QWenLMHeadModel"],
  "bf16": false,
  "fp16": false,
  "max_position_embeddings": 8192,
  "nested": {"seq_length": 1, "text": "\\"seq_length\\": 2, {}"},
  "seq_length": 8192,
  "use_dynamic_ntk": true,
  "use_flash_attn": "auto",
  "use_logn_attn": true,
  "vocab_size": 151936
}
"""
FORMS = {
    "as it is": lambda text: text.encode(),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "bom": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "no final newline": lambda text: text.rstrip().encode(),
    "tabs": lambda text: text.replace("  ", "\t").encode(),
    "one line": lambda text: json.dumps(json.loads(text)).encode(),
    "dense": lambda text: json.dumps(json.loads(text), separators=(",", ":")).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_only_values_change(form: str) -> None:
    data = FORMS[form](UPSTREAM)
    result = run(data, "static", 512)
    pairs = {
        b"8192": b"512",
        b'"auto"': b"false",
    }
    want = data
    for old, new in pairs.items():
        want = want.replace(old, new)
    for key in (b"use_dynamic_ntk", b"use_logn_attn"):
        for colon in (b'": ', b'":'):
            want = want.replace(key + colon + b"true", key + colon + b"false")
    for colon in (b'": ', b'":'):
        want = want.replace(b"bf16" + colon + b"false", b"bf16" + colon + b"true")
    assert result.text == want
    again = run(result.text, "static", 512, facts=ModelFacts.from_config({"seq_length": 8192}))
    assert again.text == result.text and not again.changed


def test_a_missing_key_is_added_in_the_files_own_style() -> None:
    result = run('{\n    "seq_length" : 2048\n}\n', "documented", 512)
    assert result.text.decode() == (
        '{\n    "seq_length" : 512,\n    "max_position_embeddings" : 512,\n    "bf16" : true\n}\n'
    )
    assert json.loads(run("{}", "documented", 512).text) == {
        "seq_length": 512,
        "max_position_embeddings": 512,
        "bf16": True,
    }


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["seq_length", "bf16", "fp16", "use_logn_attn", "zeta", 'quo"te', "\u00e9"]),
        st.none()
        | st.booleans()
        | st.integers(1, 9000)
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2),
    ),
    st.sampled_from([None, 2, "\t"]),
    st.booleans(),
)
def test_other_members_survive(config: dict[str, object], indent: int | str | None, ascii_only: bool) -> None:
    """Whatever else a config holds, and however it is written, it keeps its values and its order."""
    if type(config.get("seq_length", 1)) is not int:
        config["seq_length"] = 4096
    text = json.dumps(config, indent=indent, ensure_ascii=ascii_only)
    result = run(text, "documented", 512)
    after = json.loads(result.text)
    assert [k for k in after if k in config] == list(config)
    assert {k: v for k, v in after.items() if k in ("zeta", 'quo"te', "\u00e9", "use_logn_attn")} == {
        k: v for k, v in config.items() if k in ("zeta", 'quo"te', "\u00e9", "use_logn_attn")
    }
    assert after["seq_length"] == 512 and after["bf16"] is True and not after.get("fp16")


@pytest.mark.parametrize("key", ["use_logn_attn", "use_dynamic_ntk"])
def test_beyond_the_trained_length_the_feature_is_needed(key: str) -> None:
    longer = run(UPSTREAM, "static", 16384)
    outcome = next(o for o in longer.outcomes if o.codemod == f"config:{key}")
    assert outcome.status is Status.DECLINED and outcome in longer.declined and outcome.line
    off = UPSTREAM.replace(f'"{key}": true', f'"{key}": false')
    assert f"config:{key}" not in {o.codemod for o in run(off, "static", 16384).declined}
    at = run(UPSTREAM, "static", 8192)
    assert not at.declined


def test_the_trained_length_of_a_patched_config_is_not_its_seq_length() -> None:
    patched = run(UPSTREAM, "documented", 512).text
    longer = run(patched, "static", 1024, facts=ModelFacts.from_config({"seq_length": 8192}))
    assert not longer.declined
    assert run(patched, "static", 1024).declined  # taken alone, it says it was trained at 512


def test_a_quantised_cache_is_not_silently_dropped() -> None:
    text = UPSTREAM.replace('"vocab_size"', '"use_cache_quantization": true,\n  "vocab_size"')
    (declined,) = run(text, "static", 512).declined
    assert declined.codemod == "config:use_cache_quantization"
    assert not run(text, "documented", 512).declined


def test_skipping_a_config_edit() -> None:
    for name in ("logn-attention", "config:use_logn_attn"):
        result = run(UPSTREAM, "static", 512, skip=[name])
        outcome = next(o for o in result.outcomes if o.codemod == "config:use_logn_attn")
        assert outcome.suppressed and b'"use_logn_attn": true' in result.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": 1, "a": 2}',
        '{"seq_length": "long"}',
        '{"seq_length": 0}',
        b"\xff{}",
        "[" * 100000,
    ],
)
def test_what_is_not_a_config_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        run(text, "static", 512)
    assert str(caught.value)
