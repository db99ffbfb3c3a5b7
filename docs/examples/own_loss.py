"""Trains the retriever with a loss of one's own, and logs numbers of one's own.

    python own_loss.py                 # under a minute on a laptop's CPU

The loss is hard EM (Min et al. 2019): of the passages that were retrieved, the one under which the right answer is
likeliest counts as the right passage. The texts and the model are those of own_data.py, which has to lie beside this
file.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
from own_data import make_config, make_texts

import rag_jax
from rag_jax import losses
from rag_jax.training.session import Moment


def hard_em(scores_BK: jax.Array, token_logp_BKT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """-log p(z*|x) [B], where z* is the passage with the largest log p(y|x,z).

    scores_BK: inner products of question and passages; they carry the gradient to the retriever.
    token_logp_BKT: log p(y_t|x,z_k,y_<t), 0 where mask_BT is False. No gradient passes the argmax,
      so that the loss does not train the generator.
    """
    best_B = token_logp_BKT.sum(-1).argmax(-1)
    return -jnp.take_along_axis(losses.prior_logp(scores_BK), best_B[:, None], axis=1)[:, 0]


def log(moment: Moment) -> dict[str, float]:
    """Called at every log line. What it returns is written to the run's metrics.jsonl and TensorBoard files."""
    size = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(moment.params["question_encoder"])) ** 0.5
    shown = {name: round(moment.metrics[name], 3) for name in ("loss", "hard_em") if name in moment.metrics}
    print(f"{moment.stage}, step {moment.step}: {shown}, norm of the question encoder {size:.2f}")
    return {"mine/question_encoder_norm": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of all stages together (default: %(default)s)")
    args = parser.parse_args()
    config = make_config(args.steps)
    # The last stage adds the loss with weight 0.5. With prior_gradient=False the retriever learns from it alone.
    config["stages"][-1] |= {"retriever_losses": {"hard_em": 0.5}, "prior_gradient": False}
    with tempfile.TemporaryDirectory() as folder:
        result = rag_jax.fit(config, f"{folder}/run", data=make_texts(), losses={"hard_em": hard_em}, hooks=[log])
    print(f"the last row of metrics: hard_em {result.last['hard_em']:.3f}, loss {result.last['loss']:.3f}")


if __name__ == "__main__":
    main()
