"""The arithmetic of RL on responses: KL, rewards, advantages, sampling. No model, no params.

A row of ``mask_BxT`` is one response: contiguous, starting anywhere; ``value_BxT`` is the value
*before* each token. What lies outside the mask never influences a result or a gradient.
"""
