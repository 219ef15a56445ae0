"""How good is a model? Its samples against images, by their features, and its loss on images it has not seen.

    network = feature_network("inception:weights.pth")  # or a file of TorchScript, a callable, the shipped classifier
    sources = [Drawn(model, 10_000, sampler="ddim", steps=50, like=train), Pictures(others)]
    for row in evaluate(sources, train, network, held_out=test):
        print(row.name, row.values)

Each measure is a function of features by itself too: :func:`frechet_distance`, :func:`neighbours`,
:func:`precision_recall`, :func:`inception_score`, :func:`detector`, :func:`copying`. :func:`held_out_loss` needs none.
"""

from .classifier import CLASSIFIER as CLASSIFIER
from .classifier import Classifier as Classifier
from .classifier import accuracy as accuracy
from .classifier import check_labelled as check_labelled
from .classifier import features as features
from .classifier import load_classifier as load_classifier
from .classifier import noisy_accuracy as noisy_accuracy
from .classifier import save_classifier as save_classifier
from .classifier import train_classifier as train_classifier
from .curves import CURVES as CURVES
from .curves import LIMIT_STEPS as LIMIT_STEPS
from .curves import distances_to_limit as distances_to_limit
from .curves import steps_within as steps_within
from .detection import Detection as Detection
from .detection import detector as detector
from .distortion import psnr as psnr
from .feature_network import FeatureNetwork as FeatureNetwork
from .feature_network import feature_network as feature_network
from .frechet import Moments as Moments
from .frechet import frechet_distance as frechet_distance
from .loss import HeldOutLoss as HeldOutLoss
from .loss import eps_loss as eps_loss
from .loss import held_out_loss as held_out_loss
from .loss import in_proportion as in_proportion
from .loss import labels_of as labels_of
from .measures import HELD_OUT as HELD_OUT
from .measures import MEASURES as MEASURES
from .measures import Row as Row
from .measures import evaluate as evaluate
from .measures import protocol as protocol
from .nearest import Neighbours as Neighbours
from .nearest import copying as copying
from .nearest import neighbours as neighbours
from .nearest import precision_recall as precision_recall
from .score import inception_score as inception_score
from .sources import Drawn as Drawn
from .sources import Pictures as Pictures
from .sources import labels_in_turn as labels_in_turn
