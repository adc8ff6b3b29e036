"""`aquila verify`: two models side by side, each loaded by this library or by `transformers`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquila_jax.cli.command import add_command, has_tokenizer, load_model, refuse_bindings
from aquila_jax.cli.parser import at_least
from aquila_jax.errors import UserError

if TYPE_CHECKING:
    from aquila_jax.evaluation.verify import Readable, Verification

_BEYOND_TOLERANCE = 1
_SIDES = ("a", "b")
# The default of --max_tokens, and what is compared of a model with a long context at once.
_MAX_TOKENS = 1024
_TOLERANCES = {
    "tolerance": (2e-4, "of logits, in units of A's largest"),
    "kl_tolerance": (1e-5, "of mean divergence, nats per token"),
    "loss_tolerance": (1e-4, "of the loss, in nats per token"),
}


def add_to(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "verify",
        _verify,
        "whether two models are one; exit code 1 if not",
        example="aquila verify 7b 7b-converted --text text.txt --with_transformers b",
    )
    command.add_argument("a", metavar="A", help="Hugging Face directory, GGUF file or MODEL_DIR")
    command.add_argument("b", metavar="B", help="another one")
    command.add_argument("--text", required=True, metavar="FILE", help="what both shall read")
    command.add_argument(
        "--with_transformers",
        choices=(*_SIDES, "both"),
        metavar="SIDE",
        help="a, b, both: what transformers shall load",
    )
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="for both; by default each one's own",
    )
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        metavar="DTYPE",
        help="of our activations: float32 (default) or bfloat16",
    )
    command.add_argument(
        "--max_tokens",
        type=at_least(2),
        default=_MAX_TOKENS,
        metavar="N",
        help="of the text; %(default)s",
    )
    command.add_argument(
        "--max_length",
        type=at_least(2),
        metavar="N",
        help="tokens of a window; A's context, at most 1024",
    )
    for name, (default, words) in _TOLERANCES.items():
        command.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help=f"{words}; %(default)s"
        )


def _verify(arguments: argparse.Namespace, bindings: list[str]) -> int:
    refuse_bindings("verify", bindings)
    from aquila_jax.evaluation.verify import compare, read
    from aquila_jax.evaluation.windows import read_text

    limits = _tolerances(arguments)
    text = read_text(arguments.text)
    window, readings = arguments.max_length, []
    # One model after the other, so that only one is in memory.
    for side in _SIDES:
        model = _open(side, arguments)
        window = window or min(model.context_length, _MAX_TOKENS)
        ids = readings[0].ids if readings else None
        readings.append(read(model, text, window=window, max_tokens=arguments.max_tokens, ids=ids))
        del model
    found = compare(*readings)
    values = {
        "tolerance": found.relative,
        "kl_tolerance": found.kl,
        "loss_tolerance": found.loss_difference,
    }
    # Not `>`, which a NaN would pass.
    beyond = [name for name, value in values.items() if not value <= limits[name]]
    same_ids = found.first_difference is None
    _show(found)
    print("verdict\t" + ("equal" if same_ids and not beyond else _reasons(beyond, same_ids)))
    return 0 if same_ids and not beyond else _BEYOND_TOLERANCE


def _tolerances(arguments: argparse.Namespace) -> dict[str, float]:
    """The limits by their flags' names.

    Raises:
        UserError: one is negative.
    """
    limits = {name: getattr(arguments, name) for name in _TOLERANCES}
    if wrong := [f"--{name} {value}" for name, value in limits.items() if not value >= 0]:
        raise UserError(f"{', '.join(wrong)}: a tolerance is a number, 0 or more")
    return limits


def _open(side: str, arguments: argparse.Namespace) -> "Readable":
    """A model of either library."""
    own, other = (Path(getattr(arguments, name)) for name in (side, _other(side)))
    tokenizer = arguments.tokenizer
    if tokenizer is None and not has_tokenizer(own) and has_tokenizer(other):
        tokenizer = str(other)
    if arguments.with_transformers in (side, "both"):
        from aquila_jax.interop.transformers_model import TransformersModel

        return TransformersModel(own, None if tokenizer is None else Path(tokenizer))
    from aquila_jax.evaluation.verify import Ours

    return Ours(*load_model(str(own), tokenizer=tokenizer), dtype=arguments.dtype)


def _other(side: str) -> str:
    return _SIDES[1 - _SIDES.index(side)]


def _show(found: "Verification") -> None:
    """What was found, a line for each measure."""
    at = found.first_difference
    print(f"ids\t{'equal' if at is None else f'differ from number {at} on'}, {found.num_ids}")
    print(f"tokens read\t{found.num_tokens}")
    print(f"logits, max abs\t{found.max_abs:.3g} ({found.relative:.3g} of the largest)")
    print(f"logits, mean abs\t{found.mean_abs:.3g}")
    print(f"KL, nats per token\t{found.kl:.3g} (max {found.max_kl:.3g})")
    print(f"loss, nats per token\t{found.losses[0]:.4f}\t{found.losses[1]:.4f}")


def _reasons(beyond: list[str], same_ids: bool) -> str:
    reasons = [] if same_ids else ["the token ids differ"]
    return "different: " + ", ".join([*reasons, *(f"beyond --{name}" for name in beyond)])
