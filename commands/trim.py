"""r1q trim: a model without the tokens that a corpus never uses."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("model", required=False)
@click.option(
    "--keep-tokens-from",
    "corpus",
    multiple=True,
    required=True,
    metavar="CORPUS",
    help="FILE.txt, FILE.jsonl, a folder or builtin; several with commas, or by repeating the option.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
def trim(model: str | None, corpus: tuple[str, ...], output: Path) -> None:
    """Leave the tokens out of MODEL that CORPUS never uses: a smaller embedding and head, the same logits for all that stay.

    MODEL is what r1q quantize takes, with a byte-level BPE tokenizer (Qwen's and Llama 3's are such). Bytes, special tokens, the chat
    template's and whatever merging needs on the way always stay, so any text can still be read and written, other text in more
    tokens. The result is a Hugging Face folder for every other command. Take text of all languages and kinds that the model shall
    write: it cannot use a token that is gone.

    \b
    Example:
      r1q trim ./DeepSeek-R1-Distill-Qwen-1.5B --keep-tokens-from traces.jsonl,builtin -o small
      r1q quantize small --bits 4
    """
    from r1q.distill.trim import trim_vocabulary
    from r1q.models.embedded import open_model

    done = trim_vocabulary(open_model(model).source, ",".join(corpus), output)
    (tokens, kept), (before, after) = done.tokens, done.bytes
    click.echo(
        f"{'already done' if done.already else 'done'}: {output}: {tokens} tokens to {kept}, weights of {before / 1e6:.1f} MB to "
        f"{after / 1e6:.1f} MB; the corpus ({done.corpus_tokens} tokens) is cut as before"
    )
