"""Models that return one number per position instead of logits: reward models and critics.

The trunk's output layer is dropped; left in place it would be weights that no loss ever moves.
"""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from megachat.model.blueprint import Blueprint
from megachat.model.gpt import GPT


class Score(nn.Linear):
    """One number from each state, in fp32 whatever the states are in: bf16 would leave a reward 8 bits.

    A sum of products, because autocast would compute a linear layer in bf16 again.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The scores."""
        return (hidden.float() * self.weight[0].float()).sum(-1) + self.bias.float()


class Scalar(nn.Module):
    """A trunk and one number per position, which sees the tokens up to and including it."""

    tensor_plan: ClassVar[dict[str, str]] = {f"trunk.{name}": how for name, how in GPT.tensor_plan.items()}
    """How tensor parallelism cuts each module; the score stays whole."""

    def __init__(self, trunk: GPT, mean: float = 0.0, deviation: float = 1.0) -> None:
        """`mean` and `deviation`: of its scores of the answers it was trained on, once they are known.

        They are kept with the model and change nothing that it computes.
        """
        super().__init__()
        self.trunk, self.mean, self.deviation = trunk, mean, deviation
        trunk.head = None
        self.score = Score(trunk.config.dim)
        # Of order 1 at first, as in Stiennon et al., 2020 (https://arxiv.org/abs/2009.01325), appendix B.
        nn.init.normal_(self.score.weight, 0.0, (trunk.config.dim + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    def forward(
        self, tokens: Int[Tensor, "batch seq"], documents: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq"]:
        """The score of each prefix of each row."""
        scores: Tensor = self.score(self.trunk.hidden(tokens, documents))
        return scores

    def normalised(self, scores: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Scores of mean 0 and deviation 1 over the answers it was trained on."""
        return (scores - self.mean) / max(self.deviation, 1e-8)


def scored(trunk: Blueprint[GPT]) -> Blueprint[Scalar]:
    """The trunk's weights under a fresh score."""
    model = Scalar(trunk.model)
    fresh = {f"weight.score.{name}": value.clone() for name, value in model.score.state_dict().items()}

    def read(name: str, *index: slice) -> Tensor:
        if name in fresh:
            return fresh[name][index]
        return trunk.read(name.replace("weight.trunk.", "weight.", 1), *index)

    return Blueprint(model, read)
