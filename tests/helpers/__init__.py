"""What the tests share: caches, models, trainers and processes to test with."""
