"""What the recipe stands on, by kind: machine (where it runs), learning (what is trained), keeping (what lies on disk),
pictures. Imports point one way: keeping -> learning -> machine, pictures -> machine, all of them -> errors and
evo_vit."""
