"""Synthetic pediatric chest radiographs, drawn from a seed: the embedded default data set.

A chest is a few dozen analytic shapes: rib cage, lungs, heart, diaphragm, bones and vessels, whose
attenuation adds up along the beam. `bacteria` fills part of one lung (a consolidation), `virus`
draws streaks and patches about both hila, and `normal` leaves the lungs alone. All else that
varies (size, pose, turn, exposure, blur, noise, shutters, tubes, markers) does so in every class
alike.

It is a stand-in: it exercises the whole path from files to report, with a known answer, where the
real films are not at hand. How well a network does on it is no evidence of how well it does on
radiographs.

Measured on the default tree (seed 0: 1,200 images to train on, 400 of other patients to test),
area under the ROC curve on the test images:

=====================================================================  =====
mean brightness                                                        0.506
logistic regression on 32 x 32 pixels, best of four penalties on test  0.761
two convolutions and a dense layer, 64 px, 12 epochs, two seeds        0.954
residual network of four blocks, 64 px, 12 epochs, two seeds           0.994
=====================================================================  =====
"""

from cnnjax.phantom.film import Kind, Phantom, draw
from cnnjax.phantom.tree import DRAWN, is_drawn, write_tree

VERSION = 1
"""Raised whenever the same seed draws other pixels, so that stored trees are told apart."""

__all__ = ["DRAWN", "VERSION", "Kind", "Phantom", "draw", "is_drawn", "write_tree"]
