"""`redpen inspect` and `redpen report`: rollouts and their reverse KL by token, in the terminal and as a page."""
