"""DreamBooth: subjects learnt on one text-to-image model, asked of its siblings (Revisit Model Adaptation, Tables 1, 2, 8-11)."""
