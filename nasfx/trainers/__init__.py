"""One-shot trainers with the names, parameters and defaults of NNI's, over `nasfx.search`."""

from nasfx.trainers.base import BaseOneShotTrainer as BaseOneShotTrainer
from nasfx.trainers.base import SearchTrainer as SearchTrainer
from nasfx.trainers.darts import DartsTrainer as DartsTrainer
from nasfx.trainers.enas import EnasTrainer as EnasTrainer
from nasfx.trainers.fbnet import FBNetTrainer as FBNetTrainer
from nasfx.trainers.lookup import LookUpTable as LookUpTable
from nasfx.trainers.lookup import NASConfig as NASConfig
from nasfx.trainers.proxyless import ProxylessTrainer as ProxylessTrainer
from nasfx.trainers.replacing import replace_input_choice as replace_input_choice
from nasfx.trainers.replacing import replace_layer_choice as replace_layer_choice
from nasfx.trainers.single_path import SinglePathTrainer as SinglePathTrainer
