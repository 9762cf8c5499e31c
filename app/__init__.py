"""Counterpart: what differs between a brain scan and its generated healthy counterpart."""

__version__ = "0.1.0"
