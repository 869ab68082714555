"""``qwen-surgery restore``: bring back the original bytes of a patched checkout."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_surgery import console


@click.command("restore")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was restored as JSON, alone on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def command(checkout: Path, as_json: bool, quiet: bool) -> int:
    """Bring back the exact original bytes and permission bits of a patched CHECKOUT.

    Refuses (exit 3, nothing written) when a file is neither what patch wrote nor the original it kept.
    """
    from qwen_surgery.patching import write

    done = write.restore(checkout)
    files = done.files if done else ()
    untouched = done.untouched if done else ()
    if as_json:
        console.print_json(
            {
                "patched": done is not None,
                "restored": list(files),
                "untouched": list(untouched),
                "notes": list(done.notes) if done else [],
            }
        )
        return 0
    if quiet:
        return 0
    if done is None:
        console.line(f"nothing to restore: {checkout} holds no receipt of a patch", err=True)
        return 0
    for note in done.notes:
        console.line(note, err=True)
    for name in files:
        console.line(f"restored {checkout / name}")
    for name in untouched:
        console.line(f"{checkout / name} is the original already")
    return 0
