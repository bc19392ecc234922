"""What each expert is good at: samples of its text as numbers, from which the router is fitted and novelty is judged."""
