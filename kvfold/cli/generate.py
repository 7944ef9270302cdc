"""`kvfold generate`: continue a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from kvfold.cli.options import Device, Dtype, Model, require


def command(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Answer it, by the tokenizer's chat template.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.", min=1e-3)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt."""
    from kvfold.evaluation.generate import generate
    from kvfold.report.tables import STDOUT, print_json

    require(ctx, sample, "--sample", "temperature", "seed")
    made = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        sample=sample,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    STDOUT.print(prompt, style="bold", end="\n" if chat else "", markup=False, highlight=False)
    STDOUT.print(made.text, markup=False, highlight=False)
    print_json(vars(made))
