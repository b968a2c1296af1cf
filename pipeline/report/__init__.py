"""Looking at a cache: what is in it, and where the teacher's red pen fell."""
