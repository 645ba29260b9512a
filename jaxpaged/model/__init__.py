"""Pure functions on arrays: weights, cache and the step. Knows no request, no scheduler and no file."""
