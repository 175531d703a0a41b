"""Running a trained policy: predictions, offline metrics, closed-loop rollouts."""
