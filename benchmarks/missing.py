"""What a part of the benchmark needs and this machine has not."""


class Missing(Exception):
    """Data or a bundle; the text goes on the page, and the other parts are measured."""
