# The gate is new to the weights and learns ten times as fast. Of the priors that shape its
# decisions, weight decay would draw the means to 0.5.
_base_ = './ade20k_adamw_160k.py'

optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'backbone.gate': dict(lr_mult=10.0),
            'backbone.gate_loss': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
            'reg_token': dict(decay_mult=0.0),
            'cls_emb': dict(decay_mult=0.0),
        },
    )
)
