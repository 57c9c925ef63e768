"""TRL's loss without TRL's metrics.

After the loss, `DPOTrainer._compute_loss` computes entropy, mean logits and the accuracy of the most likely token, and
copies some twelve numbers to the host in every forward. Nobody has asked for them, and on packed rows the head does
not compute them. So the method is compiled again without that part. The loss itself stays TRL's code; what this relies
on is pinned by tests/training/test_trl_contract.py.

Two expressions of it are written otherwise, so that pairs can be weighed (training/pair_loss.py): a type's mean over
the pairs, and the mean of the tokens that a mask selects. For the latter there is a second reason: selecting by a mask
makes the host wait for a GPU, since the number of tokens is the shape of the result.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
    means = _Means()
    means.visit(function)
    if means.rewritten != {"masked_mean", "pair_mean"}:
        raise RuntimeError(
            "this version of TRL takes the means of its DPO loss in another way; install a version in the range of "
            "pyproject.toml"
        )
    parts = ", ".join(f"{name!r}: {name}" for name in LOSS_PARTS)
    function.body[ends[0] :] = ast.parse(f"return loss, {{{parts}}}").body
    # Line numbers of the original, for tracebacks.
    ast.increment_lineno(tree, method.__code__.co_firstlineno - 1)
    names: dict[str, Any] = dict(vars(dpo_trainer)) | {"masked_mean": masked_mean, "pair_mean": pair_mean}
    exec(compile(ast.fix_missing_locations(tree), dpo_trainer.__file__, "exec"), names)
    compiled: Callable[..., tuple[Any, dict[str, Any]]] = names[function.name]
    return compiled


def pair_mean(trainer: Any, losses: torch.Tensor, loss_type: str) -> torch.Tensor:
    """The mean of a type's losses, (pairs,), each times the pair's weight. Those of `sft` are weighed by tokens."""
    weights = getattr(trainer, "pair_weights", None)
    return losses.mean() if weights is None or loss_type == "sft" else (losses * weights).mean()


def masked_mean(trainer: Any, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of values, (pairs, tokens), where the mask is 1, each times its pair's weight in the sft loss."""
    weights = getattr(trainer, "sft_weights", None)
    chosen = values * mask if weights is None else values * mask * weights[:, None]
    return chosen.sum() / mask.sum()


class _Means(ast.NodeTransformer):
    """Writes `per_sequence_loss.mean()` and `values[mask.bool()].mean()` as calls of the two functions above."""

    def __init__(self) -> None:
        self.rewritten: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="per_sequence_loss"), attr="mean"), args=[]):
                return self._call(node, "pair_mean(self, per_sequence_loss, loss_type)")
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Subscript(
                        value=values, slice=ast.Call(func=ast.Attribute(value=mask, attr="bool"), args=[])
                    ),
                    attr="mean",
                ),
                args=[],
            ):
                return self._call(node, f"masked_mean(self, {ast.unparse(values)}, {ast.unparse(mask)})")
        return node

    def _call(self, node: ast.Call, text: str) -> ast.AST:
        self.rewritten.add(text.partition("(")[0])
        return ast.copy_location(ast.parse(text, mode="eval").body, node)


def _assigned(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
