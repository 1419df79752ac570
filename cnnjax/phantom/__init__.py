"""Synthetic pediatric chest radiographs, drawn from a seed: the embedded default data set.

A chest is a few dozen analytic shapes: rib cage, lungs, heart, diaphragm, bones and vessels, whose
attenuation adds up along the beam. `bacteria` fills part of one lung (a consolidation), `virus`
draws streaks and patches around both hila, and `normal` does not change the lungs. All other
variation (size, pose, turn, exposure, blur, noise, shutters, tubes, markers) is independent of the
class.

The phantoms test the whole pipeline from files to report, with a known answer, when real
radiographs are not available. Results on phantoms are no evidence of results on radiographs.

Area under the ROC curve on the test images, measured on the default tree (seed 0: 1,200 training
images, and 400 test images of other patients):

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
"""Increased when the same seed draws other pixels; it is a part of the name of a stored tree."""

__all__ = ["DRAWN", "VERSION", "Kind", "Phantom", "draw", "is_drawn", "write_tree"]
