"""The rival of `rag-jax bench train`: the same training step by transformers' RAG in PyTorch, as its users write it.

The step has the question encoder, inner products with given documents (it does not have to search), the generator with
torch's fused attention, loss, gradients, clipping and fused AdamW. A load in bfloat16 runs under autocast.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rag_jax.bench import synthetic_load
from rag_jax.bench.synthetic_load import StepLoad
from rag_jax.pretrained.export import save_pretrained
from rag_jax.rag import Params, Rag
from rag_jax.training.optimizer import OptimizerConfig

KINDS = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}


class TorchBatch(NamedTuple):
    """One batch of the rival, on the host: the questions, labels and documents that our step uses.

    context_ids_BKL: documents joined with their questions.
    documents_BKE: vectors of the documents, for the scores.
    """

    question_ids: np.ndarray
    context_ids_BKL: np.ndarray
    documents_BKE: np.ndarray
    labels_BT: np.ndarray


def model(rag: Rag, params: Params, directory: Path, device: str) -> Any:
    """transformers' model with the same weights, exported to `directory`, in training mode; device: cpu or cuda."""
    import transformers

    save_pretrained(directory, rag, params)
    return getattr(transformers, KINDS[rag.variant]).from_pretrained(directory).to(device).train()


def loss(module: Any, given: TorchBatch, load: StepLoad) -> Any:
    """The loss, a mean over the questions, as a torch scalar."""
    import torch

    on = module.device
    ids, contexts, labels = (torch.tensor(x.astype(np.int64), device=on) for x in (given[0], given[1], given[3]))
    documents = torch.tensor(given.documents_BKE, device=on)
    autocast: Any = contextlib.nullcontext()
    if load.dtype == "bfloat16":
        autocast = torch.autocast(on.type, torch.bfloat16)
    with autocast:
        query = module.question_encoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        scores = torch.bmm(query.float()[:, None], documents.transpose(1, 2))[:, 0]
        flat = contexts.reshape(-1, contexts.shape[-1])
        out = module(
            context_input_ids=flat, context_attention_mask=torch.ones_like(flat), doc_scores=scores, labels=labels,
            n_docs=load.docs,
        )  # fmt: skip
    return out.loss.mean()


def optimizer(module: Any, config: OptimizerConfig) -> Any:
    """Fused AdamW with the settings of our step; biases and LayerNorms have no weight decay."""
    import torch

    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps, fused=True)


def stepper(module: Any, load: StepLoad) -> Callable[[TorchBatch], float]:
    """step(batch) -> loss: updates the module, and returns when the device has finished."""
    import torch

    config = synthetic_load.stage(load).optimizer
    updates = optimizer(module, config)

    def step(given: TorchBatch) -> float:
        value = loss(module, given, load)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        updates.step()
        updates.zero_grad(set_to_none=True)
        if value.is_cuda:
            torch.cuda.synchronize()
        return float(value.detach())

    return step


def plain_loss(module: Any, given: TorchBatch, load: StepLoad) -> float:
    """The loss without dropout."""
    import torch

    module.eval()
    with torch.no_grad():
        value = float(loss(module, given, load))
    module.train()
    return value
