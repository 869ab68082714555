"""The check code of a net's weights: SHA-256 as TPU-MLIR computes it.

TPU-MLIR's SHA-256 counts the message's bits in 32 bits, so that the code of a section of 512 MiB or more (the
embedding of a real model) is not the SHA-256 of its bytes: the count at the message's end is cut to 32 bits.
Source of facts: the check codes of bmodels it made; below 512 MiB both are the same.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
from functools import cache

from qwen_surgery.errors import ToolFailed


class _Context(ctypes.Structure):
    """OpenSSL's SHA256_CTX; ``low`` and ``high`` are the bit count's halves."""

    _fields_ = (
        ("state", ctypes.c_uint * 8),
        ("low", ctypes.c_uint),
        ("high", ctypes.c_uint),
        ("data", ctypes.c_uint * 16),
        ("filled", ctypes.c_uint),
        ("length", ctypes.c_uint),
    )


@cache
def _crypto() -> ctypes.CDLL:
    """OpenSSL's library: hashlib itself does not let the bit count be changed."""
    for name in (ctypes.util.find_library("crypto"), "libcrypto.so.3", "libcrypto.so.1.1"):
        if name:
            try:
                library = ctypes.CDLL(name)
                library.SHA256_Init, library.SHA256_Update, library.SHA256_Final  # noqa: B018  (must be there)
                return library
            except (OSError, AttributeError):
                continue
    raise ToolFailed(
        "weights of 512 MiB or more need OpenSSL's library for their check code, and none was found",
        hint="install libssl (libcrypto.so.3)",
    )


class CheckCode:
    """Like ``hashlib.sha256()``, for a section of *size* bytes in all."""

    def __init__(self, size: int) -> None:
        self._plain = hashlib.sha256() if size < 1 << 29 else None
        self._context = _Context()
        if self._plain is None:
            _crypto().SHA256_Init(ctypes.byref(self._context))

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._plain is not None:
            self._plain.update(data)
        else:
            _crypto().SHA256_Update(ctypes.byref(self._context), data, ctypes.c_size_t(len(data)))

    def digest(self) -> bytes:
        """The 32 bytes of the code; nothing may be taken after it."""
        if self._plain is not None:
            return self._plain.digest()
        self._context.high = 0
        result = (ctypes.c_ubyte * 32)()
        _crypto().SHA256_Final(result, ctypes.byref(self._context))
        return bytes(result)
