"""Models against each other: a grid of runs at equal budgets, their scores, and how sure their differences are."""
