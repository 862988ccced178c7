"""What tests share."""
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / 'recipes'
PAPER = RECIPES / 'paper'
HELPERS = Path(__file__).parent
