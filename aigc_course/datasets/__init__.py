"""Data sets as verified tensors: MNIST from ``data/``, pictures of your own, and toy densities in the plane."""

from .files import DataError, FileCheck, check_data, inflate, verified_bytes
from .folders import image_folder
from .mnist import MNIST_FILES, Images, binarize, load_mnist, read_idx
from .toy import MOONS_STD, TOY_NAMES, toy_2d, toy_log_density, toy_mixture

__all__ = [
    "MNIST_FILES",
    "MOONS_STD",
    "TOY_NAMES",
    "DataError",
    "FileCheck",
    "Images",
    "binarize",
    "check_data",
    "image_folder",
    "inflate",
    "load_mnist",
    "read_idx",
    "toy_2d",
    "toy_log_density",
    "toy_mixture",
    "verified_bytes",
]
