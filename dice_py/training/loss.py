"""TRL's loss without TRL's metrics.

After the loss, `DPOTrainer._compute_loss` computes entropy, mean logits and the accuracy of the most likely token, and
copies some twelve numbers to the host in every forward. Nobody has asked for them, and on packed rows the head does
not compute them. So the method is compiled again without that part. The loss itself stays TRL's code; what this relies
on is pinned by tests/training/test_trl_contract.py.

One expression of it is written otherwise: the mean of the tokens that a mask selects. Selecting by a mask makes the
host wait for a GPU, since the number of tokens is the shape of the result.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

FIRST_METRIC = "per_token_entropy"
"""The variable that the first statement after the loss assigns."""
LOSS_PARTS = ("chosen_logps", "rejected_logps", "chosen_logratios", "rejected_logratios")
"""Variables of TRL's method: (pairs,) each, in nats."""


@cache
def loss_of_trl() -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`DPOTrainer._compute_loss` until its metrics: (trainer, model, inputs, return_outputs) → (loss, `LOSS_PARTS`).

    Raises:
        RuntimeError: the installed TRL computes its loss in another way.
    """
    from trl.trainer import dpo_trainer

    method = vars(dpo_trainer.DPOTrainer)["_compute_loss"]
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    ends = [at for at, statement in enumerate(function.body) if _assigned(statement) == {FIRST_METRIC}]
    if len(ends) != 1:
        raise RuntimeError(
            f"this version of TRL computes its DPO loss in another way ({FIRST_METRIC} is assigned {len(ends)} times); "
            "install a version in the range of pyproject.toml"
        )
    _MaskedMeans().visit(function)
    parts = ", ".join(f"{name!r}: {name}" for name in LOSS_PARTS)
    function.body[ends[0] :] = ast.parse(f"return loss, {{{parts}}}").body
    # Line numbers of the original, for tracebacks.
    ast.increment_lineno(tree, method.__code__.co_firstlineno - 1)
    names: dict[str, Any] = dict(vars(dpo_trainer))
    exec(compile(ast.fix_missing_locations(tree), dpo_trainer.__file__, "exec"), names)
    compiled: Callable[..., tuple[Any, dict[str, Any]]] = names[function.name]
    return compiled


class _MaskedMeans(ast.NodeTransformer):
    """Writes `values[mask.bool()].mean()` as `(values * mask).sum() / mask.sum()`, which is the same mean."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Subscript(
                        value=values, slice=ast.Call(func=ast.Attribute(value=mask, attr="bool"), args=[])
                    ),
                    attr="mean",
                ),
                args=[],
            ):
                selected, each = ast.unparse(values), ast.unparse(mask)
                mean = f"(({selected}) * ({each})).sum() / ({each}).sum()"
                return ast.copy_location(ast.parse(mean, mode="eval").body, node)
        return node


def _assigned(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
