"""The engine: the description of a sweep, its operators and derivatives, and the backends that compute it."""
