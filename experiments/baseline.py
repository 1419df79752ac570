"""The blog post to the letter: its network, its augmentation, its optimizer, its batches of 32.

python experiments/baseline.py --data.root DIR --workdir RUN
"""

from pathlib import Path

from cnnjax.cli import train
from cnnjax.config import Config, ModelConfig

# All else that the post sets are the defaults of cnnjax.config.
CONFIG = Config(workdir=Path("runs/baseline"), model=ModelConfig("baseline", channels=3))

if __name__ == "__main__":
    train(CONFIG, __doc__ or "")
