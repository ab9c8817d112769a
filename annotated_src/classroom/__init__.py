"""Hand the exercises to a class, and mark what comes back, with nbgrader."""
