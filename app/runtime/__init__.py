"""Bundles and their onnxruntime sessions. No other package imports onnxruntime."""
