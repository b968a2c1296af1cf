"""Measuring a student: accuracy on held-out prompts, reverse KL to its teacher on fresh rollouts."""
