"""Forks whose layers are Qwen v1's and whose model is not: each does something around its layers.

Nothing in the patched layers is wrong, so nets that are fed one another's outputs agree with themselves. Each
fork says where model and nets part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from codemods.framework import recipes


@dataclass(frozen=True)
class Fork:
    """``edits`` are (text of the modeling file, what stands there instead); ``place`` is part of the refusal.

    ``layers`` and ``seq_length`` (tokens) are the sizes at which the fork shows.
    """

    name: str
    place: str
    edits: tuple[tuple[str, str], ...]
    layers: int = 3
    seq_length: int = 16


_LOOKUP = "hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds\n"
_DROP = "        hidden_states = self.drop(hidden_states)\n        presents"
_LOOP = "        for block, layer_past in zip(self.h, past_key_values):\n"
_STATES = "            hidden_states, *rest = block(\n                hidden_states,\n"
_NORM = "        hidden_states = self.ln_f(hidden_states)\n        all_hidden"
_LOGITS = "        logits = self.lm_head(body.last_hidden_state)\n"
_TABLES = (
    "        rotary_pos_emb_list = "
    "[self.rotary_emb(kv_seq_len, ntk_alpha=alpha) for alpha in ntk_alpha_list]\n"
)
_BUILT = "        self.ln_f = RMSNorm(self.embed_dim, eps=config.layer_norm_epsilon)\n        self.rotary_emb"
_BETWEEN = "between embedding and block_0"


def _after(text: str, *lines: str) -> tuple[str, str]:
    return text, text + "".join(f"        {line}\n" for line in lines)


def _before(text: str, *lines: str) -> tuple[str, str]:
    return text, "".join(f"        {line}\n" for line in lines) + text


FORKS = (
    # what the model does with its logits
    Fork("logits capped", "after lm_head", (_after(_LOGITS, "logits = 30 * torch.tanh(logits / 30)"),)),
    Fork("logits clamped", "after lm_head", (_after(_LOGITS, "logits = logits.clamp(-40, 40)"),)),
    Fork("logits scaled", "after lm_head", (_after(_LOGITS, "logits = logits / 2"),)),
    Fork(
        "one token forbidden",
        "after lm_head",
        (_after(_LOGITS, "logits[..., 7] = torch.finfo(logits.dtype).min"),),
    ),
    Fork(
        "an output layer of its own",
        "lm_head",
        (
            (
                "        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n",
                "        self.lm_head = _Scaled(config.hidden_size, config.vocab_size, bias=False)\n",
            ),
            (
                "class QWenLMHeadModel(",
                "class _Scaled(nn.Linear):\n    def forward(self, states):\n"
                "        return super().forward(states) * 0.25\n\n\nclass QWenLMHeadModel(",
            ),
        ),
    ),
    # what it does with its embeddings
    Fork("embeddings scaled", _BETWEEN, (_after(_LOOKUP, "hidden_states = hidden_states * 4.0"),)),
    Fork(
        "embeddings scaled behind dropout",
        _BETWEEN,
        ((_DROP, _DROP.replace("self.drop(hidden_states)", "self.drop(hidden_states) * 4.0")),),
    ),
    Fork(
        "embeddings normalised",
        _BETWEEN,
        (_after(_LOOKUP, "hidden_states = F.normalize(hidden_states, dim=-1)"),),
    ),
    Fork(
        "positions added to embeddings",
        "between embedding_cache and block_cache_0",
        (
            _before(
                _DROP,
                "places = torch.arange(kv_seq_len - new_length, kv_seq_len)[None, :, None]",
                "hidden_states = hidden_states + 0.1 * torch.sin(places.float())",
            ),
        ),
    ),
    Fork(
        "an embedding class of its own",
        "embedding",
        (
            (
                "self.wte = nn.Embedding(self.vocab_size, self.embed_dim)",
                "self.wte = _Scaled(self.vocab_size, self.embed_dim)",
            ),
            (
                "class QWenModel(",
                "class _Scaled(nn.Embedding):\n    def forward(self, ids):\n"
                "        return super().forward(ids) * 3.0\n\n\nclass QWenModel(",
            ),
        ),
    ),
    # masks and positions
    Fork(
        "distances added to the mask",
        "QWenModel hands on another mask",  # the edits are declined before there is a twin
        (
            _before(
                _DROP,
                "far = torch.arange(kv_seq_len).float()[None, None, None, :] - kv_seq_len",
                "attention_mask = 0.05 * far if attention_mask is None else attention_mask + 0.05 * far",
            ),
        ),
    ),
    Fork(
        "a window on the keys",
        "QWenModel hands on another mask",
        (
            _before(
                _DROP,
                "old = torch.arange(kv_seq_len) < kv_seq_len - 4",
                "if new_length == 1:",
                "    attention_mask = (old.float() * torch.finfo(self.dtype).min)[None, None, None, :]",
            ),
        ),
    ),
    Fork(
        "positions stretched",
        "block_cache_0",
        (
            _after(
                _TABLES,
                "rotary_pos_emb_list = [",
                "    [table.repeat_interleave(2, dim=1)[:, :kv_seq_len] for table in tables]",
                "    for tables in rotary_pos_emb_list",
                "]",
            ),
        ),
    ),
    Fork(
        "another rotary base",
        "block_cache_0",
        ((_TABLES, _TABLES.replace("ntk_alpha=alpha", "ntk_alpha=2 * alpha")),),
    ),
    # layers
    Fork(
        "a late layer acts on its index",
        "it is not seen what uses QWenBlock",
        (
            _after(
                "        super().__init__(config)\n        self.vocab_size = config.vocab_size\n",
                "QWenBlock.made = 0",
            ),
            (
                "class QWenModel(",
                "import functools\n\n_block_init = QWenBlock.__init__\n"
                "_block_forward = QWenBlock.forward\n\n\n"
                "def _numbered(self, config):\n    _block_init(self, config)\n"
                "    self.place = getattr(QWenBlock, 'made', 1)\n    QWenBlock.made = self.place + 1\n\n\n"
                "@functools.wraps(_block_forward)\ndef _placed(self, hidden_states, **given):\n"
                "    if self.place == 20:\n        hidden_states = hidden_states * 1.01\n"
                "    return _block_forward(self, hidden_states, **given)\n\n\n"
                "QWenBlock.__init__, QWenBlock.forward = _numbered, _placed\n\n\nclass QWenModel(",
            ),
        ),
        layers=24,
    ),
    Fork(
        "layers changed after they were made",
        "block_1",
        (
            _before(
                _BUILT,
                "for place, block in enumerate(self.h):",
                "    block.ln_1.eps = config.layer_norm_epsilon * 10 ** (4 * place)",
            ),
        ),
    ),
    Fork(
        "states scaled between layers",
        "between block_0 and block_1",
        (
            (
                "                all_attentions += (rest.pop(0),)\n",
                "                all_attentions += (rest.pop(0),)\n"
                "            hidden_states = hidden_states * 0.9\n",
            ),
        ),
    ),
    Fork(
        "the embedding added before each layer",
        "between block_0 and block_1",
        (
            _before(_LOOP, "first = torch.zeros_like(hidden_states)"),
            (
                _STATES,
                "            before, hidden_states = hidden_states, hidden_states + first\n"
                "            first = before if len(all_hidden_states) == 1 else first\n" + _STATES,
            ),
        ),
    ),
    Fork("a layer skipped", "does not run layer 2", ((_LOOP, _LOOP.replace("self.h,", "self.h[:-1],")),)),
    Fork(
        "layers in another order",
        "[0, 2, 1]",
        ((_LOOP, _LOOP.replace("self.h,", "[self.h[0], self.h[2], self.h[1]],")),),
    ),
    # what it does after its layers
    Fork("no final norm", "between block_2 and lm_head", ((_NORM, "        all_hidden"),)),
    Fork(
        "the final norm twice",
        "between block_2 and lm_head",
        ((_NORM, _NORM.replace("self.ln_f(hidden_states)", "self.ln_f(self.ln_f(hidden_states))")),),
    ),
    Fork(
        "the mean of the layers",
        "between block_2 and lm_head",
        (_before(_NORM, "hidden_states = torch.stack((*all_hidden_states, hidden_states)).mean(0)"),),
    ),
    # what it does at some steps alone
    Fork(
        "decode steps scaled",
        "between embedding_cache and block_cache_0",
        (_before(_DROP, "if kv_seq_len != new_length:", "    hidden_states = hidden_states * 1.01"),),
    ),
    Fork(
        "long contexts scaled",
        "between embedding_cache and block_cache_0",
        (_before(_DROP, "if kv_seq_len > 31:", "    hidden_states = hidden_states * 1.01"),),
        seq_length=32,
    ),
    Fork(
        "generation forgets",
        "block_cache_0",
        (
            (
                "    def get_output_embeddings(self):\n",
                "    def prepare_inputs_for_generation(self, ids, past_key_values=None, **given):\n"
                "        if past_key_values is None:\n"
                "            return {'input_ids': ids, 'use_cache': True}\n"
                "        short = tuple((key[:, -4:], value[:, -4:]) for key, value in past_key_values)\n"
                "        return {'input_ids': ids[:, -1:], 'past_key_values': short, 'use_cache': True}\n\n"
                "    def get_output_embeddings(self):\n",
            ),
        ),
    ),
)


def leave_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the reading of the model's forward out of recipe ``static``: it declines most of these forks."""
    left = tuple(name for name in recipes.STATIC.codemods if name != "model-forward")
    monkeypatch.setitem(recipes.BUILTIN, "static", replace(recipes.STATIC, codemods=left))
