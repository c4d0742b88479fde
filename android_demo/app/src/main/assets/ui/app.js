// The page of the demo. In the app, RankBridge.post takes commands and window.onEngineEvent gets events; in the desktop's
// preview a small server stands between (tools/preview.py). The page holds no state of the engine but what events said.
'use strict';

const byId = (id) => document.getElementById(id);
const COLOURS = 4;
let open = false;
let running = null; // the answer that grows: its paragraph, its last span and that one's stage

function post(command) {
  const text = JSON.stringify(command);
  if (window.RankBridge) {
    window.RankBridge.post(text);
  } else {
    fetch('command', { method: 'POST', body: text }).catch(() => show({ type: 'error', message: 'the engine is gone', hint: 'start the preview again' }));
  }
}

function add(kind, text) {
  const line = document.createElement('p');
  line.className = kind;
  line.textContent = text;
  byId('talk').append(line);
  return line;
}

function follow() {
  const talk = byId('talk');
  talk.scrollTop = talk.scrollHeight;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(0)} MB`;
}

const EVENTS = {
  opened(event) {
    open = true;
    byId('model').textContent = event.model;
    byId('facts').textContent = `${event.dtype}, ${megabytes(event.bytes)}, ${event.context} tokens of context`
      + `${event.chat ? '' : '; no chat template: it continues your text'}`;
    document.querySelectorAll('#dial .stage').forEach((choice) => choice.remove());
    event.stages.forEach((stage, i) => {
      const label = document.createElement('label');
      label.className = `choice stage stage-${i % COLOURS}`;
      const input = Object.assign(document.createElement('input'), { type: 'radio', name: 'stage', value: String(i) });
      label.append(input, ` ${i}: ${(100 * stage.keep).toFixed(0)} %`);
      label.title = `${megabytes(stage.bytes)} a token`;
      byId('dial').append(label);
    });
    byId('talk').replaceChildren();
    idle();
  },
  token(event) {
    if (!running) {
      return;
    }
    if (running.stage !== event.stage) {
      const mark = document.createElement('sup');
      mark.textContent = event.stage;
      mark.title = `stage ${event.stage}`;
      running.span = document.createElement('span');
      running.span.className = `stage-${event.stage % COLOURS}`;
      running.span.append(mark);
      running.line.append(running.span);
      running.stage = event.stage;
    }
    running.span.append(event.text);
    follow();
  },
  done(event) {
    add('foot', `${event.tokens} tokens, ${event.tokens_per_second} a second, first after ${event.first_ms.toFixed(0)} ms`
      + `${event.reused ? `; ${event.reused} tokens were in the cache` : ''}`
      + `${event.reason === 'length' ? '; cut at its length' : event.reason === 'stopped' ? '; stopped' : ''}`);
    idle();
    follow();
  },
  reset() {
    byId('talk').replaceChildren();
    idle();
  },
  closed() {
    open = false;
    byId('model').textContent = 'No bundle is open';
    idle();
  },
  error(event) {
    if (running && !running.line.textContent) {
      running.line.remove();
    }
    add('error', event.hint ? `${event.message}: ${event.hint}` : event.message);
    idle();
    follow();
  },
};

function show(event) {
  const handler = EVENTS[event.type];
  if (handler) {
    handler(event);
  }
}
window.onEngineEvent = show;

function idle() {
  running = null;
  byId('send').hidden = false;
  byId('halt').hidden = true;
  byId('send').disabled = !open;
}

function ask() {
  const text = byId('text').value;
  if (!open || running || !text.trim()) {
    return;
  }
  add('user', text);
  running = { line: add('answer', ''), span: null, stage: null };
  byId('text').value = '';
  byId('send').hidden = true;
  byId('halt').hidden = false;
  follow();
  const command = { type: 'ask', text };
  for (const name of ['temperature', 'top_p', 'max_tokens']) {
    const value = byId(name).valueAsNumber;
    if (Number.isFinite(value)) {
      command[name] = value;
    }
  }
  post(command);
}

byId('form').addEventListener('submit', (event) => {
  event.preventDefault();
  ask();
});
byId('text').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
byId('halt').addEventListener('click', () => post({ type: 'stop' }));
byId('dial').addEventListener('change', (event) => {
  post({ type: 'stage', stage: event.target.value === '' ? null : Number(event.target.value) });
});
byId('again').addEventListener('click', () => {
  const system = byId('system').value;
  post(system.trim() ? { type: 'reset', system } : { type: 'reset' });
});
if (!window.RankBridge) {
  new EventSource('events').onmessage = (message) => show(JSON.parse(message.data));
}
