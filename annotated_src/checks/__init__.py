"""What lets an exercise answer: run an attempt, compare it, name its mistake."""
