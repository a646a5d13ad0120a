"""The one kit that builds images and damages them: by hand, by QEMU, by rule and at random."""
