// The page of the demo. In the app, RankBridge.post takes commands and window.onEngineEvent gets events; in the desktop's
// preview a small server stands between (tools/preview.py). The page holds no state of the engine but what events said.
'use strict';

const byId = (id) => document.getElementById(id);
const COLOURS = 4;
let open = false;
let running = null; // the answer that grows: its paragraph, its last span and that one's stage
let stages = []; // of the open bundle
let bench = null; // the stage that is measured now
let benchMs = []; // of its tokens
let opened = null; // the bundle that was chosen here
const PROMPT = 'Once upon a time there was a lighthouse at the end of the world.';
const bridge = window.RankBridge;

function post(command) {
  const text = JSON.stringify(command);
  if (bridge) {
    bridge.post(text);
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
    stages = event.stages;
    byId('shelf').open = false;
    byId('shelf_note').textContent = '';
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
    byId('dial').querySelector('input').checked = true; // the engine begins with it
    byId('talk').replaceChildren();
    bench = null;
    choosePolicy();
    idle();
  },
  token(event) {
    if (bench !== null) {
      benchMs.push(event.ms);
    }
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
    if (bench !== null) {
      measured();
      return;
    }
    add('foot', `${event.tokens} tokens, ${event.tokens_per_second.toFixed(1)} a second, first after ${event.first_ms.toFixed(0)} ms`
      + `${event.reused ? `; ${event.reused} tokens were in the cache` : ''}`
      + `${event.reason === 'length' ? '; cut at its length' : event.reason === 'stopped' ? '; stopped' : ''}`);
    idle();
    follow();
  },
  reset() {
    if (bench === null) {
      byId('talk').replaceChildren();
      idle();
    }
  },
  closed() {
    open = false;
    bench = null;
    byId('model').textContent = 'No bundle is open';
    byId('facts').textContent = '';
    idle();
  },
  bundles(event) {
    byId('bundles').replaceChildren(...event.names.map(shelved));
    byId('empty').hidden = event.names.length > 0;
    if (opened !== null) {
      return;
    }
    opened = '';
    if (event.interrupted) { // what ended the app once is not opened unasked
      byId('shelf').open = true;
      byId('shelf_note').textContent = `${event.interrupted} did not finish loading last time. Open it again, with a shorter context, or remove it.`;
    } else if (bridge && event.last) { // the preview opens a bundle by itself
      choose(event.last);
    } else if (bridge) {
      byId('shelf').open = true;
    }
  },
  import(event) {
    imports(true);
    byId('copied').value = event.total ? event.bytes / event.total : 0;
    byId('shelf_note').textContent = `${megabytes(event.bytes)} of ${megabytes(event.total)}`;
  },
  imported(event) {
    imports(false);
    byId('shelf_note').textContent = `${event.name} is imported.`;
  },
  import_error(event) {
    imports(false);
    byId('shelf').open = true;
    byId('shelf_note').textContent = event.hint ? `${event.message}: ${event.hint}` : event.message;
  },
  device(event) {
    const facts = [`${megabytes(event.memory_bytes)} of memory`];
    if (event.battery !== null) {
      facts.push(`battery ${(100 * event.battery).toFixed(0)} %${event.charging ? ', charging' : ''}`);
    }
    if (event.thermal) {
      facts.push(`heat ${event.thermal} of 6`);
    }
    byId('device').textContent = facts.join(', ');
    post({ type: 'signal', value: headroom(event) });
  },
  error(event) {
    if (bench !== null) {
      endBench();
    }
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
  awake(false);
  byId('send').hidden = false;
  byId('halt').hidden = true;
  byId('send').disabled = !open;
  byId('measure').disabled = !open;
}

function awake(on) {
  if (bridge) {
    bridge.awake(on);
  }
}

// From 1, all is well, to 0: the battery's charge, and less than that in heat (3 of 6 is "severe").
function headroom(event) {
  const battery = event.battery === null || event.charging ? 1 : event.battery;
  return Math.min(battery, event.thermal >= 3 ? 0 : event.thermal === 2 ? 0.35 : 1);
}

function choose(name) {
  opened = name;
  open = false; // the engine lets go of the bundle before
  idle();
  byId('shelf_note').textContent = `${name} is checked and loaded …`;
  post({ type: 'choose', name, ...numbers('context', 'threads', 'accuracy_level') });
}

function shelved(name) {
  const item = document.createElement('li');
  const label = Object.assign(document.createElement('span'), { textContent: name });
  const open = Object.assign(document.createElement('button'), { type: 'button', textContent: 'Open' });
  const remove = Object.assign(document.createElement('button'), { type: 'button', textContent: 'Remove' });
  open.setAttribute('aria-label', `Open ${name}`);
  remove.setAttribute('aria-label', `Remove ${name}`);
  open.onclick = () => choose(name);
  remove.onclick = () => post({ type: 'remove', name });
  item.append(label, open, remove);
  return item;
}

function imports(on) {
  byId('importing').hidden = !on;
  byId('copied').removeAttribute('value');
  byId('import').disabled = byId('pushed').disabled = on;
  awake(on);
}

function choosePolicy() {
  const kind = byId('policy').value;
  const budget = byId('budget_value').valueAsNumber;
  byId('budget').hidden = kind !== 'ms' && kind !== 'mean';
  byId('automatic').textContent = kind === 'schedule' ? 'schedule' : 'automatic';
  if (!open || (!byId('budget').hidden && !Number.isFinite(budget))) {
    return;
  }
  const command = { type: 'policy' };
  if (kind === 'device') { // equal steps below half of the charge
    command.thresholds = stages.slice(1).map((_, i) => 0.5 * (1 - i / (stages.length - 1)));
    command.hysteresis = 0.05;
  } else if (kind !== 'schedule') {
    command[kind] = budget;
  }
  post(command);
}

function numbers(...names) {
  const found = {};
  for (const name of names) {
    const value = parseFloat(byId(name).value);
    if (Number.isFinite(value)) {
      found[name] = value;
    }
  }
  return found;
}

// Settings outlive the page; without them (a private window) it only forgets.
function remember() {
  const kept = {};
  for (const field of byId('settings').querySelectorAll('input, select, textarea')) {
    kept[field.id] = field.value;
  }
  try {
    localStorage.setItem('settings', JSON.stringify(kept));
  } catch { /* nothing is kept */ }
}

function recall() {
  try {
    for (const [id, value] of Object.entries(JSON.parse(localStorage.getItem('settings') || '{}'))) {
      if (byId('settings').contains(byId(id))) {
        byId(id).value = value;
      }
    }
  } catch { /* nothing was kept */ }
  choosePolicy();
}

function measure(stage) {
  bench = stage;
  benchMs = [];
  byId('measure').disabled = byId('send').disabled = true;
  awake(true);
  post({ type: 'stage', stage });
  post({ type: 'reset' });
  post({ type: 'ask', text: PROMPT, max_tokens: 32, seed: 0 });
}

function measured() {
  const row = document.createElement('tr');
  benchMs.sort((a, b) => a - b); // the median: one of them opened the stage
  const ms = benchMs[Math.floor(benchMs.length / 2)];
  const kept = `${(100 * stages[bench].keep).toFixed(0)} %`;
  for (const text of [bench, kept, ms.toFixed(1), (1000 / ms).toFixed(1)]) {
    row.append(Object.assign(document.createElement('td'), { textContent: text }));
  }
  byId('results').tBodies[0].append(row);
  if (bench + 1 < stages.length) {
    measure(bench + 1);
  } else {
    endBench();
    byId('dial').querySelector('input').checked = true;
    post({ type: 'stage', stage: null });
    begin();
  }
}

function endBench() {
  bench = null;
  idle();
}

function begin() {
  const system = byId('system').value;
  post(system.trim() ? { type: 'reset', system } : { type: 'reset' });
}

function ask() {
  const text = byId('text').value;
  if (!open || running || bench !== null || !text.trim()) {
    return;
  }
  add('user', text);
  running = { line: add('answer', ''), span: null, stage: null };
  byId('text').value = '';
  byId('send').hidden = true;
  byId('halt').hidden = false;
  follow();
  awake(true);
  post({ type: 'ask', text, ...numbers('temperature', 'top_p', 'max_tokens') });
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
byId('again').addEventListener('click', begin);
byId('settings').addEventListener('change', remember);
byId('policy').addEventListener('change', choosePolicy);
byId('budget_value').addEventListener('change', choosePolicy);
byId('measure').addEventListener('click', () => {
  byId('results').hidden = false;
  byId('results').tBodies[0].replaceChildren();
  measure(0);
});
byId('import').addEventListener('click', () => {
  if (bridge) {
    bridge.pick();
  } else if (byId('folder').value.trim()) {
    post({ type: 'import', folder: byId('folder').value.trim() });
    imports(true);
  }
});
byId('pushed').addEventListener('click', () => bridge.importPushed());
byId('cancel').addEventListener('click', () => post({ type: 'cancel_import' }));
byId(bridge ? 'pushed' : 'folder').hidden = false;
if (!bridge) {
  new EventSource('events').onmessage = (message) => show(JSON.parse(message.data));
}
recall();
post({ type: 'bundles' });
