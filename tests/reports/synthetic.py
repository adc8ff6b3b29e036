"""Run directories such as `aquila train` leaves them, made up but with plausible curves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

DENSE = {
    "vocab_size": 8192,
    "embed_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_dim": 352,
    "num_experts": 0,
    "experts_per_token": 0,
}
WIDE = {**DENSE, "embed_dim": 160, "num_layers": 6, "num_heads": 6, "mlp_dim": 448}
MOE = {**WIDE, "num_experts": 8, "experts_per_token": 2}
LANGUAGES = ("en", "zh")


def stage(
    name: str = "dense", origin: str = "scratch", model: dict[str, Any] = DENSE, **changes: Any
) -> dict[str, Any]:
    """One ledger entry."""
    return {
        "name": name,
        "origin": origin,
        "method": "",
        "model": model,
        "parameters": 3_240_000,
        "active_parameters": 3_240_000,
        "steps": 500,
        "planned_steps": 500,
        "tokens": 4_096_000,
        "flops": 1.2e13,
        "seconds": 61.2,
        "validation_start": losses(9.0),
        "validation_end": losses(4.0),
        **changes,
    }


def losses(mean: float) -> dict[str, float]:
    return {"en": mean + 0.1, "zh": mean - 0.1, "mean": mean}


def certificate(
    method: str, exact: bool, source: dict[str, Any], target: dict[str, Any]
) -> dict[str, Any]:
    """What a growth tells; a few leaves only."""
    leaves: list[tuple[str, str, str | None, list[int]]] = [
        ("layers/attention/query", "mapped", "layers/attention/query", [6, 160, 6, 32]),
        ("layers/mlp/gate", "mapped", "layers/mlp/gate", [6, 160, 448]),
        ("final_norm/scale", "copied", "final_norm/scale", [160]),
        ("layers/router/kernel", "fresh", None, [6, 160, 8]),
    ]
    told = [
        {"path": path, "origin": origin, "source": old, "shape": shape, "how": "as told"}
        for path, origin, old, shape in leaves
    ]
    head = {"method": method, "depth": "interpolation", "exact": exact}
    return head | {"source": source, "target": target, "leaves": told}


def rows(ledger: list[dict[str, Any]], every: int = 1, validations: int = 10) -> list[dict]:
    """Metrics of the last stage of `ledger`, falling from its start to its end."""
    own, noise = ledger[-1], np.random.default_rng(len(ledger))
    spent = {key: sum(s[key] for s in ledger[:-1]) for key in ("tokens", "flops", "seconds")}
    start = own["validation_start"].get("mean", 9.0)
    end = (own.get("validation_end") or {}).get("mean", start - 0.2)
    made = []
    for step in range(own["steps"] + 1):
        part = step / own["steps"]
        loss = end + (start - end) * (np.exp(-6 * part**0.5) - np.exp(-6)) / (1 - np.exp(-6))
        row = {key: spent[key] + part * own[key] for key in spent} | {"step": step}
        if step % max(1, own["steps"] // validations) == 0:
            by_language = {
                f"loss_{k}": loss + d for k, d in zip(LANGUAGES, (0.1, -0.1), strict=True)
            }
            made.append({"split": "validation", **row, "loss": loss, **by_language})
        if step % every == 0 and step:
            row |= {"split": "train", "loss": loss + noise.normal() * 0.06}
            row["learning_rate"] = 1e-3 * min(1, part * 20) * (1 - 0.9 * part)
            row["grad_norm"] = 0.4 + np.exp(-part * 5) + abs(noise.normal()) * 0.1
            row["tokens_per_second"] = own["tokens"] / own["seconds"] * (1 + noise.normal() * 0.02)
            if own["model"].get("num_experts"):
                row["load_balance_loss"] = 1.0 + np.exp(-part * 8) * 0.3
                row["router_z_loss"] = 2.0 * np.exp(-part * 3)
            made.append(row)
    return made


def write_run(
    directory: Path,
    ledger: list[dict[str, Any]],
    metrics: list[dict] | None = None,
    **files: Any,
) -> Path:
    """A MODEL_DIR; `files` are further JSON files by their stem."""
    directory.mkdir(parents=True)
    (directory / "ledger.json").write_text(json.dumps({"stages": ledger}))
    lines = rows(ledger) if metrics is None else metrics
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def four_runs(root: Path, grown: float = 3.62, control: float = 3.79) -> list[Path]:
    """Dense, scaled up, scaled out, and a control of the last model with as much compute."""
    environment = {"python": "3.11.9", "jax": "0.10.2", "cpu": "16 cores", "devices": ["gpu"]}
    one = stage()
    two = stage("scale-up", "scale_up", WIDE, method="aki_pro")
    two |= {"parameters": 5_480_000, "active_parameters": 5_480_000, "flops": 2.1e13}
    two |= {"validation_start": losses(4.92), "validation_end": losses(3.8), "seconds": 103.0}
    big = {"parameters": 15_600_000, "active_parameters": 7_300_000}
    three = stage("scale-out", "scale_out", MOE, method="sparse_upcycling", **big)
    three |= {"flops": 3.1e13, "seconds": 210.0}
    three |= {"validation_start": losses(3.803), "validation_end": losses(grown)}
    scratch = stage("moe", "scratch", MOE, steps=1000, planned_steps=1000, **big)
    scratch |= {"flops": 6.4e13, "tokens": 8_400_000, "seconds": 433.0}
    scratch |= {"validation_end": losses(control)}
    up = certificate("aki_pro", False, DENSE, WIDE)
    out = certificate("sparse_upcycling", True, WIDE, MOE)
    return [
        write_run(root / "one", [one], environment=environment),
        write_run(root / "two", [one, two], certificate=up, environment=environment),
        write_run(root / "three", [one, two, three], certificate=out, environment=environment),
        write_run(root / "control", [scratch], environment=environment),
    ]
