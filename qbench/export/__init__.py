"""From a recipe to a checkpoint that others load: written whole or not at all, and compared with what was evaluated."""
