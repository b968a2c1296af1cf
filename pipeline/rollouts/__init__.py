"""Stage one, sampling (`redpen rollouts`)."""
