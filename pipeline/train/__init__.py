"""Stage two: replay the cache and move the student towards its teacher."""
