"""The Cython core: timing wheel, frames and hub. It imports nothing of ``presence``."""
