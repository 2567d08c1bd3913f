"""Networks: timm's backbones with a one-logit classifier, and where pretrained weights come from."""
