"""``qwen-surgery tokenizer CHECKOUT``: collect and check the tokenizer files a demo needs."""

from __future__ import annotations

from pathlib import Path

import click

from qwen_surgery import console, extras, files


@click.command("tokenizer", help="Check CHECKOUT's tokenizer files and, with --out, collect them for a demo.")
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to copy the files to.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found to stdout as JSON.")
def command(checkout: Path, out: Path | None, as_json: bool) -> None:
    extras.require("tokenizer")
    from qwen_surgery import tokenizer

    found = tokenizer.check(checkout)
    copied: list[str] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name in (*tokenizer.files_of(checkout), *tokenizer.OPTIONAL_FILES):
            if (checkout / name).is_file():
                files.write_whole(out / name, (checkout / name).read_bytes())
                copied.append(name)
    if as_json:
        console.print_json({**found, "copied": copied})
        return
    console.out().print(
        f"{found['tokens']} tokens and {found['special']} special ones; an answer ends at "
        f"<|im_end|> {found['im_end']} or <|endoftext|> {found['end_of_text']}"
    )
    if copied:
        console.out().print(f"{out}: {', '.join(copied)}")
