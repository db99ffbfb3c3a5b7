"""Writes docs/settings.md from the tables of settings that `rag-jax convert` uses."""

from pathlib import Path

from rag_jax.models.hf import SETTINGS, settings

if __name__ == "__main__":
    out = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(settings.document(SETTINGS), encoding="utf-8")
