"""The images that the studies are about: one file a data set, and loaders that keep up with a small network.

========================  ==================================================================================
``studies/digits.py``     scikit-learn's handwritten digits, 8 x 8 pixels; they come with the library
:mod:`.fashion_mnist`     28 x 28 pixels, from torchvision's mirror or from Debian's package
:mod:`.cifar10`           32 x 32 pixels in colour, from torchvision's mirror or from npm; checksums compared
:mod:`.folders`           ImageNet, and any tree with one folder a class
:mod:`.in_memory`         batches of what fits in memory, augmented a batch at a time
========================  ==================================================================================
"""
