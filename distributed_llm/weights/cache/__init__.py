"""The weights that this machine keeps on its disk, each tensor under the hash of its bytes."""
