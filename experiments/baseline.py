"""The recipe of the blog post, unchanged: network, augmentation, optimizer and batches of 32.

python experiments/baseline.py --data.root DIR --workdir RUN

The same as `cnnjax train baseline`; its settings are in cnnjax/recipes.py.
"""

from cnnjax import recipes
from cnnjax.cli import train_recipe

CONFIG = recipes.baseline

if __name__ == "__main__":
    train_recipe(CONFIG, __doc__ or "")
