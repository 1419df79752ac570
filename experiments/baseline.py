"""The blog post to the letter: its network, its augmentation, its optimizer."""

from pathlib import Path

from cnnjax.cli import train
from cnnjax.config import Config, ModelConfig

if __name__ == "__main__":
    train(Config(workdir=Path("runs/baseline"), model=ModelConfig(channels=3)), __doc__ or "")
